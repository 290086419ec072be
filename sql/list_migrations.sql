-- The migrations that have been applied, as yoyo records them.
select migration_id
from _yoyo_migration
