"""Modified SGLang runtimes: everything that touches SGLang, from outside its files."""
