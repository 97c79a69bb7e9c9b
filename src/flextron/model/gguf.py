"""placeholder"""
def open_gguf(path): raise NotImplementedError
