"""What SGLang does with its weights, and which tokens were made with which."""
