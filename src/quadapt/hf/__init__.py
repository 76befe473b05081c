"""The Hugging Face stack: loading, saving, and the one PEFT layer. Plugs itself in when transformers and PEFT are imported."""
