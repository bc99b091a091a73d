"""What people look at: the report page, the model card, their charts."""
