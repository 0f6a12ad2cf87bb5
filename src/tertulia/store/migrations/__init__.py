"""How the tables of older releases become those of schema.py. Alembic reads these files, when a database is older."""
