"""Fine-tuning methods: KaSA, those of PEFT, full fine-tuning."""
