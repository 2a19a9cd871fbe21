"""A trainer updates a cluster's weights under load, beside one server of plain SGLang."""
