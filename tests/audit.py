"""`python -m tests.audit`: known vulnerabilities of what is installed, as pip-audit knows them; part of `make check`.

A fault of a dependency fails the check. What cannot be looked up, because the index has no such service or cannot be
reached, is said and fails nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    """0: nothing is known against what could be looked up."""
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "-f", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("audit: the vulnerability service cannot be reached; nothing was looked up")
        return 0
    faults = [(item, fault) for item in packages for fault in item.get("vulns", [])]
    for item, fault in faults:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"audit: {item['name']} {item['version']}: {fault['id']}, fixed in {fixed}")
    known = sum("vulns" in item for item in packages)
    print(f"audit: {known} of {len(packages)} packages looked up, {len(faults)} known vulnerabilities")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
