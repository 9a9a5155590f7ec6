"""Binds kvsdk's connectors to vLLM. The only package of kvsdk that imports vLLM."""
