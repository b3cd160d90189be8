"""The page at /train/ui: its files, its login, and what it hears."""
