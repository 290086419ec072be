-- Move users whose domain the file has changed to their new pool, and end the sessions of those with a new password.
-- The last statement before the commit, because it locks rows that releases want; in the order of their ids, as
-- releases do.
with moving as materialized (
    select locks.user_id, pools.id as pool_id, import_rows.secret is not null as has_new_password
    from pg_temp.import_rows
    join pools using (project_id, env, domain)
    join locks on locks.user_id = import_rows.id
    where import_rows.kind = 'updated'
        and (
            locks.pool_id <> pools.id
            or (locks.session_until is not null and import_rows.secret is not null)
        )
    order by locks.lock_id
    for update of locks
)
update locks
set pool_id = moving.pool_id,
    ready_at = case
        when lock_id is null and locks.pool_id <> moving.pool_id then greatest(ready_at, clock_timestamp())
        else ready_at
    end,
    session_until = case when moving.has_new_password then null else session_until end
from moving
where locks.user_id = moving.user_id
