"""The selective scan of Mamba, in either direction."""
