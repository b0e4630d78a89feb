"""What pyproject.toml cannot say: ``configs/`` lies beside the package in a checkout and inside it (``r1mega/configs``) in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["r1mega", "r1mega.*"]), "r1mega.configs"],
    package_dir={"r1mega.configs": "configs"},
    package_data={"r1mega.configs": ["*.yaml", "*/*.yaml"]},
    include_package_data=False,
)
