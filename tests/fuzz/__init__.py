"""Thousands of broken and hostile files of every format that Puna reads; see `__main__.py`."""
