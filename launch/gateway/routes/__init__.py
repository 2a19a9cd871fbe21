"""SGLang's routes at the gateway: each is somebody's."""
