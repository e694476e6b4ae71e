"""How the extension was built; importing it registers ``torch.ops.fastsn``."""

torch_version: str
compiler: str
cuda_reason: str

def cpu_capability() -> str: ...
