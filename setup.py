"""What pyproject.toml cannot say: ``configs/`` lies beside the package in a checkout and inside it in a wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["r1mega", "r1mega.*"], exclude=["*__pycache__*"]), "r1mega.configs"],
    package_dir={"r1mega.configs": "configs"},
    package_data={"r1mega.configs": ["*.yaml", "*/*.yaml"]},
    include_package_data=False,
)
