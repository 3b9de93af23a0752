"""The `kasa` command."""
