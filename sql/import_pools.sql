-- The pools of the users in the file that are not there yet.
select distinct project_id, env, domain
from pg_temp.import_rows
where not exists (
    select
    from pools
    where pools.project_id = import_rows.project_id
        and pools.env = import_rows.env
        and pools.domain = import_rows.domain
)
order by project_id, env, domain
