"""Fine-tuning: the last blocks of a backbone, trained behind a fitted head, kept only where that helps."""
