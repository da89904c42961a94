"""Packaging: everything is read from settings.ini, which nbdev reads too."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = _parser["DEFAULT"]
# the README's own links and figure, where there is no checkout beside it: on a package index
text = (HERE / "README.md").read_text(encoding="utf-8")
text = re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)", lambda m: f"{m[0]}{cfg['git_url']}/{'raw' if m[1] else 'blob'}/{cfg['branch']}/", text)
extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "offline", "onnx")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=text,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    license="Apache-2.0",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Education",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed"],
    keywords=cfg["keywords"].split(),
    packages=find_namespace_packages(include=["mmfuse", "mmfuse.*"]),  # weights/ too, which holds data only
    package_data={"mmfuse": ["py.typed"], "mmfuse.weights": ["*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
