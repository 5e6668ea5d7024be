import sys; sys.path.insert(0,'/tmp/w/d/tests')
from conftest import *
from trouble_support import *
def test_smoke(home, sim, monkeypatch):
    small_volumes(monkeypatch)
    v = add_volume(sim, "data")
    r = run(home); 
    r = run(home, "restore", "data", "--to-volume", "data-2", expect=None)
    print(r.stdout, r.stderr)
    (new,) = [x for x in sim.volumes if x.name == "data-2"]
    assert same(new.path, v.path)
    assert r.returncode == 0
    assert [i for i in sim.alive()] == [new]
