"""What a process without a GPU needs beside SGLang."""
