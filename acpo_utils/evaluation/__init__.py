"""Base against fine-tuned model: images, metrics, tables, pictures, reports."""
