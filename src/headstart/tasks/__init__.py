"""What the user has: folders, tables, arrays, saved data sets and embedded names, split and sealed."""

from __future__ import annotations

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import Problem as Problem
from .doctor import doctor as doctor
from .embedded import EMBEDDED as EMBEDDED
from .examples import Examples as Examples
from .examples import Images as Images
from .examples import Rows as Rows
from .examples import Texts as Texts
from .load import load_task as load_task
from .task import Judged as Judged
from .task import Task as Task
from .task import wilson as wilson
