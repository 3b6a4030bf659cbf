"""What faces the network: gateway, servicers, tokens, and the backbone deployment."""
