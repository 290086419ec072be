-- Make the users that are new, each with its lock.
-- A login that another call has taken since the line was staged is left to import_overtaken.sql.
with created as (
    insert into users (id, created_at, project_id, env, domain, login, labels, secret)
    select id, clock_timestamp(), project_id, env, domain, login, labels, secret
    from pg_temp.import_rows
    where kind = 'created'
    order by line
    on conflict (project_id, env, login) do nothing
    returning id, project_id, env, domain
),
unlocked as (
    insert into locks (user_id, pool_id)
    select created.id, pools.id
    from created
    join pools using (project_id, env, domain)
)
select count(*)
from created
