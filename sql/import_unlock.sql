-- Make the locks of the users that are new.
insert into locks (user_id, pool_id)
select import_rows.id, pools.id
from pg_temp.import_rows
join pools using (project_id, env, domain)
where kind = 'created'
order by line
