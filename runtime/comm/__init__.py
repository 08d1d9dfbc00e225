"""How ranks talk: groups with collectives, dispatch and combine of tokens between experts, and KV transfers."""
