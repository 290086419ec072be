-- Move users whose domain the file has changed to their new pool.
-- The last statement before the commit, because it locks rows that releases want.
update locks
set pool_id = pools.id,
    ready_at = case when lock_id is null then greatest(ready_at, clock_timestamp()) else ready_at end
from pg_temp.import_rows
join pools using (project_id, env, domain)
where import_rows.kind = 'updated'
    and locks.user_id = import_rows.id
    and locks.pool_id <> pools.id
