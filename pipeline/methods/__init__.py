"""Ways of adapting a base: KaSA, those of Hugging Face PEFT, and full fine-tuning, all through the same training stage."""
