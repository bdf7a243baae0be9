"""Configuration, recipes, the work plan, running stages in order, the report and the command line."""
