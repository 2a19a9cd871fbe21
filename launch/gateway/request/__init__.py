"""One request: prompt, parts, walk, exchange with the engines, answer, trace."""
