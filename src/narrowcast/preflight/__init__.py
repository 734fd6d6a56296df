"""What is wrong in a recipe or a script before it runs: rules on its source, rules on one step."""
