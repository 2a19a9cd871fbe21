"""KV movement held to a rate where the network does not keep it apart; and the NICs."""
