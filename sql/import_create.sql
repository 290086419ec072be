-- Make the users that are new, with their locks.
-- A plain insert (11 -> 8 us a row against `on conflict do nothing`): where another call has made one of them
-- meanwhile, the statement fails and the import with it.
with created as (
    insert into users (id, created_at, project_id, env, domain, login, labels, secret)
    select id, clock_timestamp(), project_id, env, domain, login, labels, secret
    from pg_temp.import_rows
    where kind = 'created'
    order by line
    returning id, project_id, env, domain
)
insert into locks (user_id, pool_id)
select created.id, pools.id
from created
join pools using (project_id, env, domain)
