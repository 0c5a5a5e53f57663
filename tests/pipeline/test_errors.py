import pickle

from pipeline.errors import StorageError, WorkerError
from pmet.errors import InputError, PMETError


def test_a_worker_error_travels_with_its_cause():
    error = pickle.loads(pickle.dumps(WorkerError("worker 3 died", cause_text="Traceback …")))
    assert str(error) == "worker 3 died"
    assert error.cause_text == "Traceback …"


def test_failures_of_machines_are_not_bad_input():
    for error in (StorageError, WorkerError):
        assert issubclass(error, PMETError)
        assert not issubclass(error, InputError)
