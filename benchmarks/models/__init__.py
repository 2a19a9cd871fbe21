"""Every family of models over every path, against plain SGLang."""
