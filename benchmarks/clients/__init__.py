"""Clients that converse with a cluster, and judge every answer by plain SGLang's."""
