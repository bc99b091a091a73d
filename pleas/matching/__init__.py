"""Which unit of one parent is which unit of another."""
