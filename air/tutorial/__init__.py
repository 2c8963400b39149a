"""The tutorial: AIR step by step. `render` makes its page."""
