"""The command line `vaeplus`: one file for each family of commands."""
