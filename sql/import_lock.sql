-- Lock the users that the file changes, in one order, so that two imports can't wait for each other.
select users.id
from users
join pg_temp.import_rows using (id)
where import_rows.kind = 'updated'
order by users.id
for update of users
