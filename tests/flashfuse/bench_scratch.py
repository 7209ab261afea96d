import sys,time,statistics,math; sys.path.insert(0,"tests/codegen")
import torch; torch.set_num_threads(2)
from specs import *
from flashfuse import chunked_attention as ca
B,H,S,D=1,8,2048,64
if len(sys.argv)>2: S=int(sys.argv[2])
W=256
def mkspec(kind):
    p=Program(); x=p.s*(1/math.sqrt(D))
    if kind=="plain": return p.spec(x,EmptyRows.IMPOSSIBLE)
    keep = p.n<=p.m
    if kind=="window": keep=keep&(p.m-p.n<W)
    return p.spec(p.masked(keep,x,float("-inf")),EmptyRows.IMPOSSIBLE)
def eager(kind):
    def causal(q,k,v):
        a=(q@k.transpose(-1,-2))*(1/math.sqrt(D))
        if kind!="plain":
            i=torch.arange(S); m=i[None,:]>i[:,None]
            if kind=="window": m=m|(i[:,None]-i[None,:]>=W)
            a=a.masked_fill(m,float("-inf"))
        return a.softmax(-1)@v
    return causal
def med(fs,n):
    ts=[[] for _ in fs]
    for _ in range(n):
        for f,t in zip(fs,ts):
            t0=time.perf_counter(); f(); t.append(time.perf_counter()-t0)
    return [statistics.median(t)*1e3 for t in ts]
base = "base" in sys.argv[1] if len(sys.argv)>1 else True

compiled={}
for kind in ("causal","window","plain"):
    spec=mkspec(kind)
    q,k,v=(torch.randn(B,H,S,D) for _ in range(3)); go=torch.randn(B,H,S,D)
    def f(rows,chunk):
        def g():
            ca._ROWS,ca._CHUNK_CPU=rows,chunk
            o=torch.empty(B,H,S,D); ca.forward(spec,q,k,v,[],[],o)
        return g
    def fb(rows,chunk):
        def g():
            ca._ROWS,ca._CHUNK_CPU=rows,chunk
            o=torch.empty(B,H,S,D); st=ca.forward(spec,q,k,v,[],[],o)
            return ca.backward(spec,go,q,k,v,o,st,[],[],[])
        return g
    c=torch.compile(eager(kind)); qr,kr,vr=(t.clone().requires_grad_() for t in (q,k,v))
    def i():
        with torch.no_grad(): return c(q,k,v)
    def ib():
        o=c(qr,kr,vr); return torch.autograd.grad(o,(qr,kr,vr),go)
    cfgs=[(r,1<<s) for r in (64,128,256) for s in (17,18,19,20)]
    fs=[i,ib]+[f(*x) for x in cfgs]+[fb(*x) for x in cfgs]
    for g in fs: g();g()
    r=med(fs,9)
    print(kind,"inductor %.1f %.1f"%tuple(r[:2]))
    n=len(cfgs)
    for j,x in enumerate(cfgs): print("   rows %d chunk 2^%d: fwd %.1f (%.2f) fwd+bwd %.1f (%.2f)"%(x[0],x[1].bit_length()-1,r[2+j],r[0]/r[2+j],r[2+n+j],r[1]/r[2+n+j]),flush=True)
