-- What became of the lines of an import.
select kind, count(*)
from pg_temp.import_rows
group by kind
