"""Tables from records. Nothing here loads a model."""
