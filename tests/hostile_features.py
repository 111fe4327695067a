"""Feature functions that try to break out, to hang, to exhaust memory or to spoil other results. {marker} is a file.

An attack that works gives a number or leaves the marker; one that is contained raises, hits a limit, or gives nothing.
"""

# ruff: noqa: E501 (sources are easier to compare on one line)

from __future__ import annotations


def function(body: str) -> str:
    """A feature function with this body."""
    return "def feature(prompt, info):\n" + "\n".join(f"    {line}" for line in body.strip("\n").splitlines()) + "\n"


_WALK = "().__class__.__base__.__subclasses__()"
_OPEN = "open({marker!r}, 'w').write('x')"

HOSTILE: dict[str, str] = {
    # -- walks through objects
    "subclasses": function(f"return len({_WALK})"),
    "subclasses to os": function(
        f"for c in {_WALK}:\n    if 'os' in c.__init__.__globals__:\n"
        "        return c.__init__.__globals__['os'].system('touch {marker}')\nraise ValueError('none')"
    ),
    "class of a string": function("return len(''.__class__.__mro__[1].__subclasses__())"),
    "globals of a function": function("return len(feature.__globals__['__builtins__'].__dict__)"),
    "builtins through re": function("return re.compile.__globals__['__builtins__']['__import__']('os').system('true')"),
    "builtins through math": function("return len(math.__loader__.load_module('os').listdir('/'))"),
    "re to enum to sys": function("return len(re.enum.sys.modules['os'].listdir('/'))"),
    "loader of re": function("return len(re.__loader__.get_data('/etc/passwd'))"),
    "spec of re": function("return len(re.__spec__.loader.path)"),
    "frame of an exception": function(
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    return len(e.__traceback__.tb_frame.f_back.f_globals)"
    ),
    "frame of a generator": function("g = (x for x in [1])\nreturn len(g.gi_frame.f_back.f_globals)"),
    "code replaced": function("feature.__code__ = (lambda p, i: 5).__code__\nreturn feature.__code__.co_stacksize"),
    "closure cells": function(
        "x = 1\ndef g():\n    return x\nreturn g.__closure__[0].cell_contents + len(g.__globals__)"
    ),
    "format attribute walk": function("return len('{{0.__class__.__mro__}}'.format(prompt))"),
    "format globals walk": function("return len('{{0.__globals__}}'.format(feature))"),
    "getattr walk": function("return len(getattr(getattr((), '__cla' + 'ss__'), '__ba' + 'se__').__subclasses__())"),
    "type of three arguments": function(
        "return len(type('X', (object,), {{}}).__subclasshook__.__self__.__mro__[1].__subclasses__())"
    ),
    "metaclass": function(
        "class M(type):\n    def __getattr__(c, n):\n        return 1\nclass X(metaclass=M):\n    pass\nreturn X.y + len(type.__subclasses__(type))"
    ),
    "vars of a module": function("return len(vars(math)['__loader__'].__class__.__mro__)"),
    "dir and globals": function("return len(globals()['__builtins__'].__dict__)"),
    "decorated at definition": "def d(f):\n    open({marker!r}, 'w').write('x')\n    return f\n@d\ndef feature(prompt, info):\n    return 1\n",
    "default argument": "X = open({marker!r}, 'w').write('x')\ndef feature(prompt, info):\n    return 1\n",
    "class body": "class C:\n    x = open({marker!r}, 'w').write('x')\ndef feature(prompt, info):\n    return 1\n",
    # -- files, processes, network
    "write a file": function(f"{_OPEN}\nreturn 1"),
    "read a file": function("return len(open('/etc/passwd').read())"),
    "pathlib": function("import pathlib\nreturn len(pathlib.Path('/etc/passwd').read_text())"),
    "io": function("import io\nreturn len(io.open('/etc/passwd').read())"),
    "os.open": function("import os\nreturn len(os.read(os.open('/etc/passwd', 0), 10))"),
    "os.system": function("import os\nos.system('touch {marker}')\nraise ValueError(os.listdir('/'))"),
    "os.environ": function("import os\nreturn len(os.environ['PATH'])"),
    "os.listdir": function("import os\nreturn len(os.listdir('/etc'))"),
    "os.fork": function("import os\nreturn os.fork()"),
    "os.kill": function("import os\nos.kill(os.getppid(), 9)\nraise ValueError('tried')"),
    "subprocess": function("import subprocess\nreturn len(subprocess.check_output(['id']))"),
    "multiprocessing": function(
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\nreturn p.pid"
    ),
    "ctypes": function("import ctypes\nreturn ctypes.CDLL(None).getpid()"),
    "socket": function("import socket\nreturn socket.create_connection(('127.0.0.1', 9), 1).fileno()"),
    "urllib": function("import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:9').status"),
    "shutil": function("import shutil\nshutil.copy('/etc/passwd', {marker!r})\nreturn 1"),
    "signal": function("import signal, os\nsignal.raise_signal(9)\nreturn 1"),
    "importlib": function("import importlib\nreturn len(importlib.import_module('os').listdir('/etc'))"),
    "dunder import": function("return len(__import__('os').listdir('/etc'))"),
    "eval": function("return len(eval(\"__import__('os').listdir('/etc')\"))"),
    "exec": function("exec(\"open({marker!r}, 'w').write('x')\")\nraise ValueError('tried')"),
    "compile": function("return eval(compile(\"len(open('/etc/passwd').read())\", 'x', 'eval'))"),
    "exit": function("import sys\nsys.exit(0)"),
    "os._exit": function("import os\nos._exit(0)"),
    "pickle": function("import pickle\nreturn len(pickle.loads(b\"cposix\\nlistdir\\n(S'/etc'\\ntR.\"))"),
    "input": function("return len(input())"),
    "breakpoint": function("breakpoint()\nraise ValueError('none')"),
    # -- time
    "endless loop": function("while True:\n    pass"),
    "endless loop that swallows": function(
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
    ),
    "endless loop at import": "while True:\n    pass\ndef feature(prompt, info):\n    return 1\n",
    "endless iterator": function("return sum(1 for _ in iter(int, 1))"),
    "sleep": function("import time\ntime.sleep(1000)\nreturn 1"),
    "catastrophic expression": function("return 1 if re.match('(a+)+$', 'a' * 60 + 'b') else re.no_such_name"),
    "nested loops": function("n = 0\nfor a in range(10**4):\n    for b in range(10**4):\n        n += 1\nreturn n"),
    # -- memory and stack
    "long string": function("return len('a' * 10**10)"),
    "doubling list": function("x = [0]\nwhile True:\n    x = x + x"),
    "power tower": function("return len(str(9 ** 9 ** 9))"),
    "number to text": function("return len(str(10 ** (10 ** 7)))"),
    "range to list": function("return len(list(range(10**9)))"),
    "deep recursion": function("def g(n):\n    return g(n + 1) + 1\nreturn g(0)"),
    "recursion in repr": function("x = []\nfor _ in range(100000):\n    x = [x]\nreturn len(repr(x))"),
    "format width": function("return len('%999999999999d' % 1)"),
    "join bomb": function("return len(','.join(['x' * 10**6] * 10**6))"),
    "dictionary of everything": function("d = {{}}\ni = 0\nwhile True:\n    d[i] = str(i) * 100\n    i += 1"),
    "printed flood": function("while True:\n    print('x' * 1000)"),
    # -- source that is hard on a parser
    "deep parentheses": "def feature(prompt, info):\n    return " + "(" * 3000 + "1" + ")" * 3000 + "\n",
    "many minus signs": "def feature(prompt, info):\n    return " + "-" * 7000 + "1\n",
    "null byte": "def feature(prompt, info):\n    return 1\0\n",
    "surrogates": "def feature(prompt, info):\n    return '\udcff'\n",
    "not python": "def feature(prompt, info): ]]]\n",
    "async": "async def feature(prompt, info):\n    return 1\n",
    "generator": function("yield 1"),
    # -- results
    "not a number": function("return float('nan')"),
    "infinite": function("return float('inf')"),
    "text": function("return 'many'"),
    "list": function("return [1, 2]"),
    "the row itself": function("return info"),
    "a function": function("return feature"),
    "changing type": function("return 1 if len(prompt) % 2 else 'odd'"),
    "huge result": function("return 'x' * (30 << 20)"),
    "complex": function("return 1j"),
    "int that is no int": "class N(int):\n    def __float__(self):\n        raise ValueError('no')\ndef feature(prompt, info):\n    return N(3)\n",
    # -- exceptions and state
    "error without text": "class E(Exception):\n    def __str__(self):\n        raise ValueError('nested')\ndef feature(prompt, info):\n    raise E()\n",
    "error with endless text": "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\ndef feature(prompt, info):\n    raise E()\n",
    "error with huge text": function("raise ValueError('x' * 10**7)"),
    "system exit": function("raise SystemExit(0)"),
    "keyboard interrupt": function("raise KeyboardInterrupt"),
    "base exception": function("raise BaseException('all')"),
    "counts its calls": "S = []\ndef feature(prompt, info):\n    S.append(1)\n    return len(S)\n",
    "random": function("import random\nreturn random.random()"),
    "clock": function("import time\nreturn time.time_ns() % 1000003"),
    "replaces the driver": "def feature(prompt, info):\n    global __feature_driver\n    __feature_driver = None\n    raise ValueError('x')\n",
    "replaces exceptions": "Exception = BaseException = int\ndef feature(prompt, info):\n    return 1 / 0\n",
}
