import subprocess
import sys

PROGRAM = """
import structlog
from kvindex.log import LogLevel, configure_logging

configure_logging(LogLevel.INFO)

def answer(prompt):
    raise ZeroDivisionError("by nothing")

try:
    answer("sesame " * 3)
except ZeroDivisionError:
    structlog.get_logger().exception("failed")
"""


def test_a_traceback_is_logged_without_the_values_of_variables():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "by nothing" in done.stderr
    assert '"name": "answer"' in done.stderr
    assert "sesame" not in done.stderr
