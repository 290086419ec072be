-- The users that an import creates and changes, for the log.
select id, kind
from pg_temp.import_rows
where kind <> 'unchanged'
