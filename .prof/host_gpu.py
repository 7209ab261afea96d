import torch, time, cProfile, pstats, io, sys
sys.path.insert(0,"benchmarks")
from attention_code import VARIANTS
print(list(VARIANTS))
def sliding(q,k,v):
    i=torch.arange(q.shape[-2],device=q.device); d=i[:,None]-i[None]
    s=(q@k.transpose(-2,-1))*0.125
    s=s.masked_fill(~((d>=0)&(d<256)),float("-inf"))
    return s.softmax(-1)@v
q,k,v=[torch.randn(4,32,128,64,device="cuda",dtype=torch.bfloat16,requires_grad=True) for _ in range(3)]
g=torch.randn_like(q)
from torch.nn.attention.flex_attention import flex_attention, create_block_mask
bm=create_block_mask(lambda b,h,m,n:(m>=n)&(m-n<256),None,None,128,128,device="cuda")
flex=torch.compile(lambda q,k,v: flex_attention(q,k,v,block_mask=bm))
ff=torch.compile(sliding,backend="flashfuse")
sd=torch.compile(lambda q,k,v: torch.nn.functional.scaled_dot_product_attention(q,k,v,is_causal=True))
def t(name,f,n=300):
    for _ in range(10): f()
    torch.cuda.synchronize(); a=time.perf_counter()
    for _ in range(n): f()
    b=time.perf_counter(); torch.cuda.synchronize()
    print(f"{name}: host {(b-a)/n*1e6:.0f} us", flush=True)
def nog(fn):
    def r():
        with torch.no_grad(): fn(q,k,v)
    return r
def fb(fn):
    def r():
        o=fn(q,k,v); o.backward(g); q.grad=k.grad=v.grad=None
    return r
for nm,fn in (("sdpa",sd),("flex",flex),("flashfuse",ff)):
    t(nm+" fwd nograd",nog(fn)); t(nm+" fwd+bwd",fb(fn))
from flashfuse.codegen import launch
from flashfuse import attention_op
import kernel_tiles as kt
spec=kt.spec_of("sliding"); qq,kk,vv=[x.detach() for x in (q,k,v)]; out=torch.empty_like(qq)
st=launch.forward(spec,qq,kk,vv,[],[],out)
t("launch.forward",lambda: launch.forward(spec,qq,kk,vv,[],[],out)); t("launch.backward",lambda: launch.backward(spec,g,qq,kk,vv,out,st,[],[],[]))
txt=spec.to_text()
t("op.attention",lambda: torch.ops.flashfuse.attention(qq,kk,vv,[],[],txt,"bhme"))
for nm,fn in (("fwd nograd",nog(ff)),("fwd+bwd",fb(ff))):
    pr=cProfile.Profile(); pr.enable()
    for _ in range(300): fn()
    pr.disable(); s=io.StringIO(); pstats.Stats(pr,stream=s).sort_stats("tottime").print_stats(22); print(nm, s.getvalue()[:4200])
