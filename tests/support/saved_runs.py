"""A run's folder with nothing in it but its record."""

from secure_cnn.record import SavedRun
from support.run_records import PROTECTED, make_record, make_result


def saved_run(name, accuracy=0.8, epsilon=2.991, **fields):
    """A run with its plain baseline; `fields` are those of its record."""
    protected = make_result(PROTECTED, 3, accuracy=accuracy, epsilon=epsilon)
    results = [make_result("plain", 3), protected]
    return SavedRun(name=name, record=make_record(**({"results": results} | fields)))
