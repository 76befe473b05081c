"""The Hugging Face stack: loading, saving, the one PEFT layer. Plugged in when transformers and PEFT are imported."""
