"""The command traffic: from the paper's form to the default, a rung for each measure."""
