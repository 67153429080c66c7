"""A page to chat with models and to see where they look."""
